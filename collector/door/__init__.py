"""How batches and people get in: the RPC edge, authentication, enrolment, the certificate authority."""
