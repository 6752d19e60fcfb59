-- How far the clock may be ahead, and for how much longer that is distrusted, in microseconds.
ALTER TABLE clock ADD COLUMN ahead INTEGER NOT NULL DEFAULT 0;
ALTER TABLE clock ADD COLUMN remaining INTEGER NOT NULL DEFAULT 0;
UPDATE clock SET ahead = (SELECT coalesce(sum(ahead), 0) FROM clock_skew),
    remaining = (SELECT coalesce(max(remaining), 0) FROM clock_skew);
DROP TABLE clock_skew;
