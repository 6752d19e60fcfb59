-- Each transaction that changes `has_entry` has a number, so that a scan reads only the changes since the last
-- scan. The numbers begin above 0, which is for rows of earlier versions.
CREATE TABLE change (number INTEGER NOT NULL);
INSERT INTO change (number) VALUES (1);
ALTER TABLE archive ADD COLUMN changed INTEGER NOT NULL DEFAULT 0;
CREATE INDEX archive_changed ON archive (changed);
