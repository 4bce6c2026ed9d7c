"""Where the judges keep their numbers between restarts."""
