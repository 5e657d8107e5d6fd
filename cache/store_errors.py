"""Error messages for the failures of an object store. The messages contain the address of the object and the store's
error code, but never the request, which can contain a signature.
"""

import re

from ..common.errors import DamagedError, UnavailableError

CREDENTIALS = {  # the variables that hold credentials, and the one for reading public buckets without them
    "s3": ("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "AWS_SKIP_SIGNATURE=true"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SKIP_SIGNATURE=true"),
    "az": ("AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN", "AZURE_SKIP_SIGNATURE=true"),
}
# obstore's error message contains one of these if obstore found no credentials and asked the machine's metadata service
# for some.
WITHOUT_CREDENTIALS = ("169.254.", "/api/token", "token request", "MissingAccessKeyId", "MissingSecretAccessKey")


class MissingError(DamagedError):
    """An object is missing."""


class TransientError(UnavailableError):
    """A store's failure that may be only temporary. The constructor takes only the message, so that other code can
    raise the same error with a longer message.
    """

    what = ""  # how the store failed

    @classmethod
    def of(cls, address: str, what: str) -> "TransientError":
        error = cls(
            f"{address}: {what}, even after several attempts. Check the network and the endpoint, and run the same "
            "command again; everything committed is safe."
        )
        error.what = what
        return error


class StoreWarning(UserWarning):
    """A request to a store failed and is retried."""


def without_credentials(address: str) -> UnavailableError:
    """The error for missing credentials; it names the environment variables to set."""
    variables, public = CREDENTIALS.get(address.partition("://")[0], CREDENTIALS["s3"])
    return UnavailableError(
        f"No credentials for {address} were found. Set them in the environment, for example {variables}; to read a "
        f"public bucket without credentials, set {public}."
    )


def failure(error: Exception, address: str) -> Exception:
    """Translate an error of obstore: MissingError for a missing object, otherwise UnavailableError."""
    text = str(error)
    code = match[1] if (match := re.search(r"<Code>(\w{1,60})</Code>", text)) else ""
    status = int(match[1]) if (match := re.search(r"status code: (\d{3})", text)) else 0
    answer = " ".join(filter(None, [str(status or ""), code])) or type(error).__name__
    # The message contains nothing else from the text, because the text can contain the request and its signature.
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return UnavailableError(f"{address}: the bucket does not exist ({answer}). Create it, or correct the address.")
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{address} is missing. Correct the address, or repeat the command that wrote it.")
    if "Account must be specified" in text:
        return UnavailableError(f"{address} needs the name of its account: set AZURE_STORAGE_ACCOUNT_NAME.")
    if any(sign in text for sign in WITHOUT_CREDENTIALS):
        return without_credentials(address)
    if status in (401, 403):
        return UnavailableError(
            f"{address}: the store refused the credentials ({answer}). Check that they are correct, have not expired, "
            "and allow reading and writing there."
        )
    if "BadScheme" in text:
        return UnavailableError(
            f"{address}: the endpoint is http://, which is not encrypted. Use https://, or set AWS_ALLOW_HTTP=true."
        )
    if status == 501 or (status and status < 500 and status != 429):
        return UnavailableError(f"{address}: the store refused the request ({answer}).")
    what = f"the store failed ({answer})" if status else "the store cannot be reached or stopped answering"
    return TransientError.of(address, what)
