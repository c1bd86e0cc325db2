"""Networks that others have published weights of, and their files read into models of kseg."""
