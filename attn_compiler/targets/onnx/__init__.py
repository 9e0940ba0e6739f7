"""A variant into the body of an ONNX function. Needs the optional package onnx_ir; import it only where something is exported."""
