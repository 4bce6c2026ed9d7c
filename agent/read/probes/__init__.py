"""The pinned maps of `weighbridge-probes` -> plain values, by plain bpf(2) calls of a user without any capability."""
