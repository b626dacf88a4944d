"""The command line: flags, the choice of trainings, the report, and the job that is started.

In the order of a launch: `options` (flags to a frozen `Config`), `session` (project, dataset, bucket), `selection` and
`sources` (runs, models, towers, files beside them), `plan` (what is published), `preflight` with `vectors`, `indexes`,
`bucket` and `permissions` (a report of `findings`), `execution` (the job). `launcher` leads through them, `console`
prints. `inspection` is --inspect; `asking` is shared by the commands that query the tables.
"""
