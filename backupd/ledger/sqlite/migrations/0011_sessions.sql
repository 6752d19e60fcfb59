-- Each run of a daemon is a session, which has a row until it is over. A claim belongs to a session. Its token
-- changes with each claim and each release, so that only the holder of a claim can record a result.
CREATE TABLE session (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    host       TEXT    NOT NULL,
    started_at INTEGER NOT NULL
);
-- The daemon of the earlier version has ended.
UPDATE delivery SET state = 'pending' WHERE state = 'claimed';
ALTER TABLE delivery ADD COLUMN token INTEGER NOT NULL DEFAULT 0;
ALTER TABLE delivery ADD COLUMN session INTEGER CHECK ((state = 'claimed') = (session IS NOT NULL));
