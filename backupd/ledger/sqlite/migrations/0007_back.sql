-- From this version on, `removal` is also 'gone' if a delivered file was missing at its disposition.
CREATE INDEX archive_gone ON archive (drop_name, relpath) WHERE removal = 'gone' AND disposed_to IS NULL;
