-- Retention in sent_dir.

-- The device or folder of which the last archives are kept; NULL until it is determined.
ALTER TABLE archive ADD COLUMN series BLOB;
-- 'expiring' once the removal of the file is decided, 'expired' once it is removed; 'gone' and 'changed' if the
-- file in sent_dir was missing, or another one, when it was to be removed
ALTER TABLE archive ADD COLUMN removal TEXT CHECK (removal IN ('expiring', 'expired', 'gone', 'changed'));
ALTER TABLE archive ADD COLUMN removed_at INTEGER;

CREATE INDEX archive_kept ON archive (drop_name, disposed_at)
    WHERE state = 'delivered' AND disposed_to IS NOT NULL AND removal IS NULL;
CREATE INDEX archive_unsorted ON archive (drop_name)
    WHERE state = 'delivered' AND disposed_to IS NOT NULL AND removal IS NULL AND series IS NULL;
CREATE INDEX archive_series ON archive (drop_name, series, disposed_at)
    WHERE series IS NOT NULL AND removal IS NULL;
CREATE INDEX archive_expiring ON archive (id) WHERE removal = 'expiring';
