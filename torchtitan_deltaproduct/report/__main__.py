from ..errors import exit_on_user_error
from . import main

exit_on_user_error(main)
