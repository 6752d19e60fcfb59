-- What the host's clock said when that was last noted.
CREATE TABLE clock (seen_at INTEGER NOT NULL);
INSERT INTO clock SELECT admitted_at FROM archive ORDER BY id DESC LIMIT 1;
-- By how many microseconds it may have been ahead, and for how many more that is not believed; in their order.
CREATE TABLE doubt (
    id        INTEGER PRIMARY KEY,
    ahead     INTEGER NOT NULL,
    remaining INTEGER NOT NULL
);
-- The last of a series by their numbers; those of a restored history have none that means anything.
CREATE INDEX archive_last ON archive (drop_name, series)
    WHERE series IS NOT NULL AND removal IS NULL;
