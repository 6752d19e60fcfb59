-- Since here `removal` is 'gone', too, where a delivered file was not there any more to be disposed of.
CREATE INDEX archive_gone ON archive (drop_name, relpath) WHERE removal = 'gone' AND disposed_to IS NULL;
