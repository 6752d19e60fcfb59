-- `sent_dir` and its receipt files are the record of sent archives; the ledger has no copy of it.
DROP INDEX archive_kept;
DROP INDEX archive_without_series;
DROP INDEX archive_series;
DROP INDEX archive_last;
DROP INDEX archive_expiring;
DROP INDEX archive_missing;

-- 1 if the file of a delivered archive was missing at its disposition
ALTER TABLE archive ADD COLUMN missing INTEGER NOT NULL DEFAULT 0;
UPDATE archive SET missing = 1 WHERE removal = 'missing' AND moved_to IS NULL;
ALTER TABLE archive DROP COLUMN series;
ALTER TABLE archive DROP COLUMN removal;
ALTER TABLE archive DROP COLUMN removed_at;
CREATE INDEX archive_missing ON archive (drop_name, relpath) WHERE missing;

-- The drops with devices that are known from the receipt files of earlier archives; none in a new ledger.
CREATE TABLE learned_drop (drop_name TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO learned_drop
    SELECT drop_name FROM restored GROUP BY drop_name HAVING count(*) > 1 OR max(folder) = x'';
DROP TABLE restored;
