"""The places where a method may stand: on the parameters, on the representation, on the losses."""
