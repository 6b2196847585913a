"""Every error AsyncOPD raises on purpose. A message says what happened, what was expected, what to do."""


class AsyncOPDError(Exception):
    """Root of the tree; catching it catches everything the platform raises on purpose.

    ::

        AsyncOPDError -- ConfigError, ShapeError, NonFiniteError, DeadlineError, RunStoppedError,
          |              SupersededError, LedgerError, RoleFailedError
          +-- StorageError -- StoreUnusableError, ShardCorruptError, ObjectMissingError -- RunMissingError
          +-- QueryError -- QueryLimitError
          +-- EngineError -- EngineAwayError
          `-- StackError -- ServerAwayError

    All of them are picklable: the message is the only argument.
    """

    repeats = False
    """Would a process that is started again fail the same way? Then a role is not, and its run ends at once."""


REPEATS = 78
"""Exit status of a role process whose error `repeats`; EX_CONFIG among Unix's."""


class ConfigError(AsyncOPDError):
    """A configuration value, or a combination of values, that cannot work."""

    repeats = True


class ShapeError(AsyncOPDError):
    """Arrays of one value disagree in shape, dtype or id range."""

    repeats = True


class StorageError(AsyncOPDError):
    """The object store refused or lost something."""


class StoreUnusableError(StorageError):
    """The storage root cannot be written, or lacks an atomic put-if-absent."""


class ObjectMissingError(StorageError):
    """A key that a manifest or a caller relies on does not exist."""


class RunMissingError(ObjectMissingError):
    """No run of that id is in the storage root."""


class ShardCorruptError(StorageError):
    """Stored bytes differ from what their manifest promises."""


class QueryError(AsyncOPDError):
    """SQL that is wrong, or not allowed."""


class QueryLimitError(QueryError):
    """A query needs more time, memory or room for its result than it may use."""


class EngineError(AsyncOPDError):
    """A sampler or scorer cannot serve the run, or a request."""

    repeats = True


class EngineAwayError(EngineError):
    """An engine's process ended or failed to start, or its server does not answer; the next one may."""

    repeats = False


class NonFiniteError(AsyncOPDError):
    """A loss or gradient became NaN or infinite; the step was abandoned and nothing was published."""


class DeadlineError(AsyncOPDError):
    """A wait ran out; the message names what it waited for."""


class RunStoppedError(AsyncOPDError):
    """The run was stopped, as its record in storage says; workers that joined it end."""


class SupersededError(AsyncOPDError):
    """Another learner took the run over; whatever this one published since counts for nothing."""


class LedgerError(AsyncOPDError):
    """An index cannot make this move from the state it is in (storage/maintain/ledger.py)."""


class RoleFailedError(AsyncOPDError):
    """A role process ended with an error; the message carries the role's own reason."""


class StackError(AsyncOPDError):
    """The local Prefect server or worker could not be started or reached."""


class ServerAwayError(StackError):
    """A Prefect server that was there does not answer now, or answers that it cannot serve."""
