-- The last reading of the host's clock.
CREATE TABLE clock (seen_at INTEGER NOT NULL);
INSERT INTO clock SELECT admitted_at FROM archive ORDER BY id DESC LIMIT 1;
-- The steps forward of the clock that are distrusted, in their order: by how much the clock may be ahead, and
-- for how much longer it is distrusted, in microseconds.
CREATE TABLE doubt (
    id        INTEGER PRIMARY KEY,
    ahead     INTEGER NOT NULL,
    remaining INTEGER NOT NULL
);
-- The newest archives of a series by id; the ids of restored archives don't show their order.
CREATE INDEX archive_last ON archive (drop_name, series)
    WHERE series IS NOT NULL AND removal IS NULL;
