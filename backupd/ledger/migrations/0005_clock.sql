-- What the host's clock said when that was last noted.
CREATE TABLE clock (seen_at INTEGER NOT NULL);
INSERT INTO clock SELECT admitted_at FROM archive ORDER BY id DESC LIMIT 1;
-- By how many microseconds it may have been ahead, and for how many more that is not believed; in their order.
CREATE TABLE doubt (
    id        INTEGER PRIMARY KEY,
    ahead     INTEGER NOT NULL,
    remaining INTEGER NOT NULL
);
