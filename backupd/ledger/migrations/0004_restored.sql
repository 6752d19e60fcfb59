-- The drops whose history was read from the records beside archives; a ledger that is begun anew has none.
CREATE TABLE restored (drop_name TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO restored SELECT DISTINCT drop_name FROM archive;
