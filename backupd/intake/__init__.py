"""From a file in a drop folder to a queued delivery: events, scans, selection and examination."""
