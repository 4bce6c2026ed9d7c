"""The edges of exactness (design): one test or more for each row that needs no kernel probes.

The rows about tombstones, rmdir and release, and full kernel maps come with the probes. The row about TLS is
`tests/collector/test_door.py::test_openssl_negotiates_tls_1_3_and_gets_no_cbc`.
"""
