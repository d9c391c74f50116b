"""The fork as an operator, and the carrier in which a state travels as a cotangent."""
