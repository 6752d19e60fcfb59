-- What each receiver of notifications knows, as JSON; see `NotificationState`.
CREATE TABLE notification (
    receiver TEXT PRIMARY KEY,
    state    TEXT NOT NULL
) WITHOUT ROWID;
