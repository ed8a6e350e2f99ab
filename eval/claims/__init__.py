"""What the papers of the methods report, as data, and the page that sets it beside the records here."""
