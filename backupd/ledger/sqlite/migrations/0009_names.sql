-- The columns, tables and values get the names of the code.

ALTER TABLE archive RENAME COLUMN device TO device_number;
ALTER TABLE archive RENAME COLUMN admitted_at TO queued_at;
ALTER TABLE archive RENAME COLUMN disposed_to TO moved_to;
ALTER TABLE archive RENAME COLUMN announced TO already_logged;
ALTER TABLE archive RENAME COLUMN live TO has_entry;
ALTER TABLE delivery RENAME COLUMN charged TO archive_failures;
ALTER TABLE delivery RENAME COLUMN faults TO destination_failures;
ALTER TABLE folder RENAME COLUMN device TO device_number;
ALTER TABLE doubt RENAME TO clock_skew;

-- `removal` is 'missing', not 'gone'. Its CHECK can't be altered, so a new column replaces it, with its indexes.
DROP INDEX archive_kept;
DROP INDEX archive_unsorted;
DROP INDEX archive_series;
DROP INDEX archive_last;
DROP INDEX archive_expiring;
DROP INDEX archive_gone;
ALTER TABLE archive RENAME COLUMN removal TO old_removal;
ALTER TABLE archive ADD COLUMN removal TEXT CHECK (removal IN ('expiring', 'expired', 'missing', 'changed'));
UPDATE archive SET removal = CASE old_removal WHEN 'gone' THEN 'missing' ELSE old_removal END
    WHERE old_removal IS NOT NULL;
ALTER TABLE archive DROP COLUMN old_removal;

CREATE INDEX archive_kept ON archive (drop_name, disposed_at)
    WHERE state = 'delivered' AND moved_to IS NOT NULL AND removal IS NULL;
CREATE INDEX archive_without_series ON archive (drop_name)
    WHERE state = 'delivered' AND moved_to IS NOT NULL AND removal IS NULL AND series IS NULL;
CREATE INDEX archive_series ON archive (drop_name, series, disposed_at)
    WHERE series IS NOT NULL AND removal IS NULL;
-- The newest archives of a series by id; the ids of restored archives don't show their order.
CREATE INDEX archive_last ON archive (drop_name, series)
    WHERE series IS NOT NULL AND removal IS NULL;
CREATE INDEX archive_expiring ON archive (id) WHERE removal = 'expiring';
-- Delivered files that were missing at their disposition.
CREATE INDEX archive_missing ON archive (drop_name, relpath) WHERE removal = 'missing' AND moved_to IS NULL;

DROP INDEX archive_live;
CREATE INDEX archive_with_entry ON archive (drop_name, relpath) WHERE has_entry;
