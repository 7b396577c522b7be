# The first sentence of each paragraph as a query, the rest as what belongs to it; from and to JSON lines.
awk '{
  text = $0; sub(/^\{"text": " */, "", text); sub(/", "label": .*$/, "", text); at = match(text, /[.] [A-Z]/)
  if (at > 40 && length(text) - at > 40)
    printf "{\"query\": \"%s\", \"positive\": \"%s\"}\n", substr(text, 1, at), substr(text, at + 2)
}'
