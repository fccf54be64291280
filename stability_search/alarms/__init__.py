"""Alarms of a running training: indicators beyond their thresholds, said once an epoch.

    watch      looks at every step and says what rises
    alarm      what an alarm says, and what it advises
    epochs     what is counted anew in every epoch
    overflows  gradient overflows once the loss scale was found

Every number of a record may be None (not finite, or not measured): it then raises no alarm, is
left out of every mean and share, and a later step is compared with the last number there was.
"""
