"""What is trained: the `Task` protocol, its loader and the tasks that come with the package."""
