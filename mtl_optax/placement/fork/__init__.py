"""The fork as an operator, and the carrier that encodes a state as a cotangent."""
