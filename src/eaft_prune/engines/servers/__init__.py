"""What every engine behind a server needs: HTTP, launching and stopping, answers checked."""
