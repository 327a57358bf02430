"""The order of things: `MixRankCompressor`, and the steps that a compression takes."""
