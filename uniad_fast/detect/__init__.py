"""Images in; scores, labels and maps out."""
