"""Check that the machine's metadata service can provide credentials. If the service does not answer, which happens in a
container on EC2, obstore would wait three minutes for an answer.
"""

import http.client
import os
from urllib.parse import urlsplit

GIVEN = (  # if one of these is set, the metadata service is not asked
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip
SECONDS = 2.0  # for the service to answer; it is local


def asks_the_machine(scheme: str) -> bool:
    """Whether obstore would ask the EC2 metadata service for credentials."""
    public = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "t", "yes", "y", "on")
    return scheme == "s3" and not public and not any(os.environ.get(name) for name in GIVEN)


def machine_answers() -> bool:
    """Whether the metadata service answers at all, with any status."""
    service = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT", "http://169.254.169.254"))
    try:
        connection = http.client.HTTPConnection(service.hostname or "", service.port, timeout=SECONDS)
        try:
            connection.request("PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
            connection.getresponse()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True
