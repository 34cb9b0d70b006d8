"""The measurements that ``vattn bench`` runs."""
