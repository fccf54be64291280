"""A study on a Ray cluster that is elsewhere: sent, followed, stopped and fetched by Ray Jobs.

Only the cluster's one HTTP port is used. What is asked of it stands in `jobs`; everything else
is written against that, so that most of it can be tested without a Ray.

    address      where a cluster is, and the token that it wants
    connection   one request: its timeout, and what can go wrong in one line
    jobs         Ray's job interface: submit, look, stop, read logs and log files
    parcel       the files that are sent, and their archive
    naming       a study's name on a cluster, and its attempts
    submitting   start, go on with, or find again
    following    the log of a job, line by line, until it ends
    result       the record that an attempt leaves of its end
    endings      how an attempt ended: by that record; where there is none, why
    stopping     ask an attempt to end
    looking      short jobs on the node of a study's driver: its files, its status
    listing      the list of a run directory's files, which the other side need not believe
    copies       what a fetched folder is a copy of
    fetching     a run directory comes home, checked by hash
    outside      what a dashboard tells whoever looks at it
    attempt      in the job: run the study and record how it ended
    snapshot     in a job beside it: a consistent copy of the ledger, and every file's hash

Where somebody else's scheduler is to start it, text is made from values and nothing is asked:

    emit_plan    what such a scheduler is told of a study
    kuberay      a manifest for Kubernetes with KubeRay
    slurm        a batch script for Slurm
"""
