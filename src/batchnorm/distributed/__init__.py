"""Messages between the ranks of a process group: who is asked, what is said, who did not answer."""
