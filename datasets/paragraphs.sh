# Paragraphs of six books of the Rust documentation with the name of their book: one JSON line each.
cd "$(rustc --print sysroot)/share/doc/rust/html" &&
find book cargo reference rustc nomicon rust-by-example -name '*.html' ! -name print.html | LC_ALL=C sort | xargs awk '
  BEGIN { RS = "</p>" }
  /<p>/ {
    sub(/.*<p>/, ""); gsub(/<[^>]*>/, ""); gsub(/[[:space:]]+/, " "); gsub(/\\/, ""); gsub(/"/, "")
    gsub(/&lt;/, "<"); gsub(/&gt;/, ">"); gsub(/&quot;|&#39;|&#x27;/, "\047"); gsub(/&amp;/, "\\&")
    split(FILENAME, path, "/")
    if (length($0) >= 120 && !seen[$0]++) printf "{\"text\": \"%s\", \"label\": \"%s\"}\n", substr($0, 1, 400), path[1]
  }' | iconv -c -f utf-8 -t utf-8
