-- A destination that takes deliveries is "working"; the table has the name of the thing.
ALTER TABLE gate RENAME TO circuit;
UPDATE circuit SET state = 'working' WHERE state = 'open';
