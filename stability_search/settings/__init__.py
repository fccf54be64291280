"""What a trial is asked to do: settings of the engine, of a trial and of a study.

    engine  how one optimizer step is taken
    alarms  beyond which value an indicator is worth a warning
    trial   one configuration with one seed: everything that decides a trial
    study   every block of a space file but the task, the settings and their ranges
    rules   how a value outside its range is refused

A setting's name is the same here, in the space file, in the tables and in the report. Every
default is PyTorch's own, so that a setting nobody names changes nothing.
"""
