"""torchrun without its own traceback, because the processes have printed their errors already."""
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

if __name__ == '__main__':
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f'Error: process {failure.local_rank} of this machine was ended by '
                  f'{signal.Signals(-failure.exitcode).name}', file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException:  # which the processes got as well, and waited for
        sys.exit(75)
