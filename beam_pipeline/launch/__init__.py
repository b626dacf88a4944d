"""The command line: flags, the choice of trainings, the report, and the job that is started."""
