-- What is removed from sent_dir in time, and what became of it there.

-- Of which device or folder it is one, the last of which are kept; NULL until that was looked at.
ALTER TABLE archive ADD COLUMN series BLOB;
-- 'expiring' once its removal is decided, 'expired' once it is done; 'gone' and 'changed' if the file in
-- sent_dir was no longer there, or no longer ours, when its time had come
ALTER TABLE archive ADD COLUMN removal TEXT CHECK (removal IN ('expiring', 'expired', 'gone', 'changed'));
ALTER TABLE archive ADD COLUMN removed_at INTEGER;

CREATE INDEX archive_kept ON archive (drop_name, disposed_at)
    WHERE state = 'delivered' AND disposed_to IS NOT NULL AND removal IS NULL;
CREATE INDEX archive_unsorted ON archive (drop_name)
    WHERE state = 'delivered' AND disposed_to IS NOT NULL AND removal IS NULL AND series IS NULL;
CREATE INDEX archive_series ON archive (drop_name, series, disposed_at)
    WHERE series IS NOT NULL AND removal IS NULL;
CREATE INDEX archive_expiring ON archive (id) WHERE removal = 'expiring';
