"""Speed, quality, records and the report of a comparison; receives callables and frames, and knows no model."""
