pub const MAX_LAG_MS: u64 = 600_000;
