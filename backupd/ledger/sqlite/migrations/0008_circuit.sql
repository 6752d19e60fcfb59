-- The table and its states get the names of the code: a circuit is 'working', not 'open'.
ALTER TABLE gate RENAME TO circuit;
UPDATE circuit SET state = 'working' WHERE state = 'open';
