-- The folders of drops from which receipt files were read into the ledger; none in a new ledger.
-- '' is all folders of a drop.
CREATE TABLE restored (
    drop_name TEXT NOT NULL,
    folder    BLOB NOT NULL,
    PRIMARY KEY (drop_name, folder)
) WITHOUT ROWID;
INSERT INTO restored
    SELECT drop_name, x'' FROM archive UNION SELECT drop_name, x'' FROM device UNION
    SELECT drop_name, x'' FROM expectation;
