"""Block-sparse attention over boxes of a token grid."""
