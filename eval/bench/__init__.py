"""The block-sparse operator against its peers: cases, operators, timing, tables and pictures."""
