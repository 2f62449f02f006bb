CREATE TABLE usage_events (id INTEGER PRIMARY KEY AUTOINCREMENT, event_key TEXT NOT NULL UNIQUE, timestamp TEXT NOT NULL, ts_epoch REAL NOT NULL, source TEXT, model TEXT,
  failed INTEGER NOT NULL DEFAULT 0, input_tokens INTEGER DEFAULT 0, output_tokens INTEGER DEFAULT 0, total_tokens INTEGER DEFAULT 0, raw_json TEXT NOT NULL);
CREATE TABLE quota_snapshots (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp TEXT NOT NULL, ts_epoch REAL NOT NULL, email TEXT NOT NULL, plan TEXT, allowed INTEGER,
  limit_reached INTEGER, primary_used_percent INTEGER, primary_remaining_percent INTEGER, primary_reset_at TEXT, secondary_used_percent INTEGER,
  secondary_remaining_percent INTEGER, secondary_reset_at TEXT, credits_balance TEXT, raw_json TEXT NOT NULL);
INSERT INTO usage_events(event_key, timestamp, ts_epoch, source, model, input_tokens, output_tokens, total_tokens, raw_json) VALUES
  ('k1', '2026-11-25T12:00:00+08:00', 1795579200, 'old@example.com', 'gpt-5.4', 900, 100, 1000, '{}');
INSERT INTO quota_snapshots(timestamp, ts_epoch, email, plan, allowed, limit_reached, primary_used_percent, primary_remaining_percent, primary_reset_at,
  secondary_used_percent, secondary_remaining_percent, secondary_reset_at, credits_balance, raw_json) VALUES
  ('2026-11-25T12:00:00+08:00', 1795579200, 'old@example.com', 'plus', 1, 0, 30, 70, '2026-11-25 18:00', 40, 60, '2026-11-30 18:00', 'None', '{}');
