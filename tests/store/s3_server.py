"""The real S3 server of the tests, which measurements have too."""

from loadtest.s3 import ACCESS_KEY, PUBLIC_BUCKET, SECRET_KEY, S3Server, s3_server

__all__ = ["ACCESS_KEY", "PUBLIC_BUCKET", "SECRET_KEY", "S3Server", "s3_server"]
