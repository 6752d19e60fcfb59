-- The archives that a destination alone does not store are listed as problems.
CREATE INDEX delivery_failing_alone ON delivery (archive_id) WHERE reason = 'fails_alone';
