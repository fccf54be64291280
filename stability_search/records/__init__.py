"""What happened: the values that cross from a training step to the ledger and the report.

    values   what every record is made of, and how it becomes JSON
    step     one attempt at an optimizer step
    trial    how a trial ended, and its row in the ledger
    verdict  how a study ended

Every class is a frozen dataclass of finite numbers, short strings and `None`; `None` stands for
a number that was not finite or was not measured, never for a default. All round-trip through
JSON by `to_json` and `from_json`.
"""
