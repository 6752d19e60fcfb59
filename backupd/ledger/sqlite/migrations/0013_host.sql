-- The host that queued the archive: another host may deliver it. It is unknown ('') for archives that have ended.
ALTER TABLE archive ADD COLUMN host TEXT NOT NULL DEFAULT '';
UPDATE archive SET host = host_name() WHERE has_entry;
